"""Memory and speed of a run, predicted from a rig's profile before it starts."""
