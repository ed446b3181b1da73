"""Will a run fit, and how fast will it be? Said before it starts, from what a rig can do."""
