"""Artifacts: what is damaged, foreign or reaches outside is refused before anything of it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mobula import artifacts
from mobula.artifacts import Artifact, open_artifact, write
from mobula.errors import ArtifactError


def fill(folder: Path) -> None:
    (folder / "part").mkdir()
    (folder / "part" / "facts.json").write_text('{"a": 1}')
    (folder / "notes.txt").write_text("first")


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return write(tmp_path / "artifact", kind="retriever", method="diffugr", meta={"levels": 4}, fill=fill)


def edit(artifact: Artifact, change) -> None:
    path = artifact.directory / artifacts.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def refused(artifact: Artifact, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        open_artifact(artifact.directory)
    assert "\n" not in str(caught.value)


def test_what_was_written_is_read(artifact: Artifact) -> None:
    again = open_artifact(artifact.directory, kind="retriever")
    assert again == artifact
    assert again.read_json("part/facts.json") == {"a": 1}
    with pytest.raises(ArtifactError, match=r"no file 'other.json'; it holds notes.txt, part/facts.json"):
        again.path("other.json")


@pytest.mark.parametrize("name", ["part/facts.json", "notes.txt"])
def test_f9_one_flipped_bit_is_found(artifact: Artifact, name: str) -> None:
    content = bytearray((artifact.directory / name).read_bytes())
    content[-1] ^= 1
    (artifact.directory / name).write_bytes(content)
    refused(artifact, f"{name}: checksum differs from the manifest")


def test_a_missing_file_is_named(artifact: Artifact) -> None:
    (artifact.directory / "notes.txt").unlink()
    refused(artifact, r"notes.txt: named in the manifest but missing")


def test_a_file_that_the_manifest_does_not_list_is_refused(artifact: Artifact) -> None:
    (artifact.directory / "part" / "extra.json").write_text("{}")
    refused(artifact, r"'part/extra.json' is not in the manifest")


@pytest.mark.parametrize(
    "name", ["../notes.txt", "/etc/passwd.txt", "part/../../x.json", "run.sh", "weights.pt", "x\0.txt"]
)
def test_s6_names_that_reach_outside_or_could_hold_code_are_refused(artifact: Artifact, name: str) -> None:
    edit(artifact, lambda m: m["files"].update({name: m["files"]["notes.txt"]}))
    refused(artifact, "may not hold|missing")


def test_s6_a_symbolic_link_is_refused_as_file_and_as_folder(artifact: Artifact, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.move(artifact.directory / "part", outside)
    (artifact.directory / "part").symlink_to(outside)
    refused(artifact, "leads elsewhere by a symbolic link")
    (artifact.directory / "part").unlink()
    (artifact.directory / "part").mkdir()
    (artifact.directory / "part" / "facts.json").symlink_to(outside / "facts.json")
    refused(artifact, "leads elsewhere by a symbolic link")


def test_the_artifact_itself_may_be_reached_by_a_link(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(artifact.directory)
    assert open_artifact(tmp_path / "link").files == artifact.files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=99), "artifact format 99; this version reads 1"),
        (lambda m: m.pop("files"), "'files' is not a dict"),
        (lambda m: m.update(kind=3), "'kind' is not a str"),
        (lambda m: m["files"].update({"notes.txt": 5}), "the entry of 'notes.txt' is not a mapping"),
        (lambda m: m["files"]["notes.txt"].pop("sha256"), "checksum differs"),
    ],
)
def test_a_foreign_manifest_is_refused(artifact: Artifact, change, message: str) -> None:
    edit(artifact, change)
    refused(artifact, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff\xfe"])
def test_a_damaged_manifest_is_refused(artifact: Artifact, text: str) -> None:
    (artifact.directory / artifacts.MANIFEST).write_bytes(text.encode("latin-1"))
    refused(artifact, "damaged manifest")


def test_another_kind_and_a_plain_folder_are_refused(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds a retriever, expected a model"):
        open_artifact(artifact.directory, kind="model")
    with pytest.raises(ArtifactError, match=r"not an artifact \(no manifest.json\)"):
        open_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="not an artifact"):
        open_artifact(tmp_path / "absent")


def test_only_inert_formats_are_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"weights.pt: .pt is not an allowed artifact format"):
        write(tmp_path / "a", kind="k", method="m", meta={}, fill=lambda f: (f / "weights.pt").write_bytes(b""))
    assert not (tmp_path / "a").exists()


def test_an_interrupted_write_leaves_the_old_artifact(artifact: Artifact) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "notes.txt").write_text("second")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(artifact.directory, kind="retriever", method="diffugr", meta={}, fill=interrupted)
    assert open_artifact(artifact.directory).meta == {"levels": 4}
    write(artifact.directory, kind="retriever", method="diffugr", meta={"levels": 5}, fill=fill)
    assert open_artifact(artifact.directory).meta == {"levels": 5}
    assert [p.name for p in artifact.directory.parent.iterdir()] == ["artifact"]


def test_an_interrupted_text_file_leaves_the_old_one(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        artifacts.write_json(tmp_path / "x.json", {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        artifacts.write_text(tmp_path / "x.json", "half a file \ud800")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
