"""The settings of a run: composed by Hydra, checked, frozen."""
