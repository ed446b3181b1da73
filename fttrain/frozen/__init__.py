"""The frozen base: where its weights come from, how they are quantised and kept on disk."""
