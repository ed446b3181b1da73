"""Gradient clipping by the global norm."""


def clip_factor(norm: float, max_norm: float) -> float:
    """The factor that brings a gradient of ``norm`` to ``max_norm`` at most, as
    ``torch.nn.utils.clip_grad_norm_`` does: min(1, max_norm / (norm + 1e-6)). ``max_norm`` of 0
    does not clip.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
