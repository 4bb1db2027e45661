"""Errors a user can act on. The command line prints their message as one line and exits with status 2."""

from __future__ import annotations


class MobulaError(Exception):
    """Something the user can mend; the message names what is wrong, what was expected and what to do."""


class ConfigError(MobulaError):
    """One or more problems in a configuration, all reported at once."""

    def __init__(self, problems: list[str], source: str) -> None:
        self.problems = problems
        self.source = source
        lines = "; ".join(problems)
        super().__init__(f"{source}: {lines}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str], str]]:
        # Raised in a worker, it travels to the driver; by default only the message would.
        return type(self), (self.problems, self.source)


class DataError(MobulaError):
    """Data that is missing, unreadable or inconsistent."""


class BadRecord(DataError):
    """A record that breaks its schema; names file, record and field."""


class RunConflict(MobulaError):
    """A run directory holds something other than what was asked for."""


class ArtifactError(MobulaError):
    """An artifact that is damaged, foreign or does not fit."""


class ClusterError(MobulaError):
    """The cluster cannot give what was asked for."""


class TrainingError(MobulaError):
    """Training stopped for a reason that a longer run would not mend (NaN, collapse)."""


class SweepFailed(MobulaError):
    """No trial of a sweep succeeded; names the reason of the first."""


class ModelError(MobulaError):
    """A model or its files that are missing, damaged or of a kind that is not supported."""
