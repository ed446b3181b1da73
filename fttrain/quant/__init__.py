"""The frozen base as bytes: 4-bit codes, their scales, their places in a layer's flat buffer."""
