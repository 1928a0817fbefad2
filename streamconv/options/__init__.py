"""Every option that a user can give, declared once: a field of one of the classes in groups.py.

The field's name, type and default are those of the library's keyword parameter; what `option` adds is its flag and help
on the command line, its key in a jobs file, and the commands that take it. The command line, jobs files, the checks of
a caller's values and the generated docs are derived from that. Only the parameters in the signatures of the public
functions are written out, for type checkers and `help`; tests/unit/test_options.py checks that none is missing.

The imports are light, because `streamconv --help` needs this package.
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
