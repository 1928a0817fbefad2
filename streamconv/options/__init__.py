"""Every option that a user can give, declared once: a field of one of the classes in groups.py.

The field's name, type and default are those of the library's keyword parameter; what `option` adds is its flag and help
on the command line, its key in a jobs file, and the commands that take it. The command line, jobs files, the check of a
caller's values and the pages made of them follow from that. What Python cannot derive is the parameter in the signature
of each public function (type checkers and `help` read it there): tests/unit/test_options.py names the function that
lacks one.

Imports nothing heavy, since `streamconv --help` reads it.
"""

from streamconv.options.commands import arguments, declared, find, parameters, public, taken_by
from streamconv.options.groups import (
    DIALECTS,
    GROUPS,
    IO,
    MMPROJ_OUTTYPES,
    TOKENIZERS,
    OutputOptions,
    RunOptions,
    SourceOptions,
    SplitOptions,
)
from streamconv.options.language import ALL, MAKE, Command, Declared, Kind, Option, not_a_choice, option

__all__ = [
    "ALL",
    "DIALECTS",
    "GROUPS",
    "IO",
    "MAKE",
    "MMPROJ_OUTTYPES",
    "TOKENIZERS",
    "Command",
    "Declared",
    "Kind",
    "Option",
    "OutputOptions",
    "RunOptions",
    "SourceOptions",
    "SplitOptions",
    "arguments",
    "declared",
    "find",
    "not_a_choice",
    "option",
    "parameters",
    "public",
    "taken_by",
]
