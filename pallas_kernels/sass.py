"""What a kernel's machine code is made of: its largest innermost loop, and what that loads and multiplies."""

import dataclasses
import re
from collections import Counter

LEAST = 10  # instructions of a loop that is more than a wait
KINDS = {
    "tensor": ("HMMA", "HGMMA", "QGMMA", "IMMA", "IGMMA", "UTCHMMA", "UTCQMMA"),
    "global loads": ("LDG", "LD."),
    "async copies": ("LDGSTS", "UBLKCP", "UTMALDG"),
    "shared loads": ("LDS", "LDSM"),
    "packed floats": ("HFMA2", "HMUL2", "HADD2"),
    "floats": ("FFMA", "FMUL", "FADD", "FMNMX", "FSETP", "MUFU", "FSEL"),
    "integers": ("LOP3", "SHF", "IMAD", "IADD3", "PRMT", "LEA", "SEL", "ISETP", "BFE", "SHL", "SHR", "POPC"),
    "conversions": ("I2F", "F2F", "F2I", "I2I", "F2FP"),
}


@dataclasses.dataclass(frozen=True)
class Loop:
    """Instructions of one turn of a loop."""

    instructions: int
    kinds: dict[str, int]


def largest_loop(text: str, *, above: int = 0) -> Loop | None:
    """Of `nvdisasm -c` output of one kernel: the largest loop that has no other in it, None without one.

    above: how many larger ones there are than the one that is asked for.
    """
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            lines.append(instruction[1])
    spans = []
    for at, line in enumerate(lines):
        if branch := re.search(r"\bBRA\b.*?(\.L_x_\d+)", line):
            start = labels.get(branch[1], at + 1)
            # A branch to itself is where a kernel's end is parked, one from behind the end a wait's way back.
            if start < at and not any(opcode(line) == "EXIT" for line in lines[start:at]):
                spans.append((start, at))
    # A wait for a barrier spins within the loop that it holds up.
    spans = [(a, b) for a, b in spans if b - a >= LEAST] or spans
    innermost = [
        (a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)
    ]
    if not innermost:
        return None
    innermost.sort(key=lambda span: span[0] - span[1])
    start, end = innermost[min(above, len(innermost) - 1)]
    names = [opcode(line) for line in lines[start : end + 1]]
    names = [name for name in names if name != "NOP"]
    return Loop(len(names), dict(Counter(map(kind, names))))


def opcode(instruction: str) -> str:
    """The name of an instruction, without its predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def kind(name: str) -> str:
    """What an instruction does, in the words of the table."""
    for found, prefixes in KINDS.items():
        if any(name.split(".")[0] == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return found
    return "other"
