"""Language agents: the action language, worlds with tools that really run, and the methods that train in them."""
