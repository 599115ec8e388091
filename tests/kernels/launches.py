"""Counts the operations that would be launches on a GPU."""

from torch.utils._python_dispatch import TorchDispatchMode

NO_LAUNCH = {
    "aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default", "aten.empty_strided.default",
    "aten.new_empty_strided.default", "aten.detach.default", "aten.alias.default", "aten.lift_fresh.default",
}  # fmt: skip
"""Operations that only allocate or rename."""


class Launches(TorchDispatchMode):
    """Names of the operations inside the block that read or write numbers; `syncs`: those for which the host waits."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and str(func) not in NO_LAUNCH:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def syncs(self) -> list[str]:
        return [name for name in self.names if name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero"))]
