"""The one exception of the emulator."""


class MetalKernelError(RuntimeError):
    """A kernel does not compile, breaks a rule of Metal, or leaves an output unwritten.

    Attributes:
        kind: "compile", "divergent-barrier", "divergent-simd", "inactive-lane", "non-uniform",
            "data-race", "uninitialised", "out-of-bounds", "misaligned", "threadgroup-memory",
            "unwritten-output", "undefined" (integer division, shift) or "timeout".
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
