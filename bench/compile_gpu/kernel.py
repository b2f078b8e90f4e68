"""One kernel on one architecture, and what it must not do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Not from bench.results: that imports torch, for seconds, and every process that compiles would.
ROOT = Path(__file__).parents[2]

ARCHS = (80, 90, 100)  # A100, H100, B200
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # that one block can have

Language = Literal["triton", "cuda"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A line of the results. No seconds: those are of a machine, and these lines are kept to be compared."""

    language: Language
    source: str  # relative to the repository
    name: str
    arch: int
    compiler: str  # and its version
    registers: int  # per thread
    max_registers: int | None  # None: its author set no budget
    shared_bytes: int  # Triton: of a launch; CUDA: the static ones
    stack_bytes: int
    local_bytes: int
    local_accesses: int  # instructions
    fp64_instructions: int
    load_bytes: int  # widest global load of a thread
    store_bytes: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.language, self.source, self.name, self.arch

    @property
    def violations(self) -> list[str]:
        """Why the gate is shut, as sentences."""
        found = []
        if self.stack_bytes or self.local_bytes or self.local_accesses:
            found.append(
                f"uses local memory: {self.stack_bytes} B of stack, {self.local_bytes} B of local variables, "
                f"{self.local_accesses} loads and stores"
            )
        if self.max_registers is None:
            found.append(f"has no register budget (it takes {self.registers})")
        elif self.registers > self.max_registers:
            found.append(f"takes {self.registers} registers, budget {self.max_registers}")
        if self.shared_bytes > (limit := MAX_SHARED_BYTES[self.arch]):
            found.append(f"takes {self.shared_bytes} B of shared memory, a block has {limit}")
        if self.fp64_instructions:
            found.append(f"computes in fp64: {self.fp64_instructions} instructions")
        return [f"{self.source}: {self.name} on sm_{self.arch} {what}" for what in found]
