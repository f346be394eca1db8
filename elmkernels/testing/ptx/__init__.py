"""What a GPU would run, run here: the compiled PTX of kernels, executed and checked on a CPU."""

from .faults import Fault, PtxError
from .launch import Device, Executed, executed
from .program import Program
from .run import execute
from .source import parse
from .state import Launch, Settings
from .traffic import Traffic

__all__ = [
    "Device",
    "Executed",
    "Fault",
    "Launch",
    "Program",
    "PtxError",
    "Settings",
    "Traffic",
    "execute",
    "executed",
    "parse",
]
