"""Ranks: how they find each other, talk, and notice that one of them is gone."""
