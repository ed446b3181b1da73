"""The frozen base as bytes: 4-bit codes, their scales, and where each lies in a layer's flat buffer."""
