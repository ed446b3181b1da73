"""The rule of gradient clipping."""


def clip_factor(norm: float, max_norm: float) -> float:
    """The factor that clips a gradient of ``norm`` to ``max_norm``, as in torch's
    ``clip_grad_norm_``; ``max_norm`` 0: no clipping.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
