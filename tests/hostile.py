"""What the tests of hostile input share: how many cases, ways to damage bytes, values that nobody expects.

100 cases a test, always the same ones, unless HYPOTHESIS_PROFILE=thorough asks for 1,000 random ones.
"""

import os
import signal

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from stages.lib import foreign_hdf5
from stages.lib.errors import UserError

COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=100, derandomize=True, **COMMON)
settings.register_profile("thorough", max_examples=1000, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

BREAKING = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=y>',
    "' onmouseover='z",
    "</title><b>",
    "&lt;i&gt;",
    "-->",
    "]]>",
)
ODD_NAMES = st.sampled_from(
    ["..", ".", "../x", "/etc/x", "a/../../b", "~", "~nobody/x", "a b", "a;b", "$(x)", "`x`", "a\nb", "a\0b", "", "-x", "a'b",
     'a"b', "ä", "a\\b", "C:x", "a|b", "CON", "x" * 300, "\ud800", "\u202egnp.exe", "a&b", "*", "{a,b}", *BREAKING]
)  # fmt: skip
TEXTS = st.one_of(ODD_NAMES, st.text(max_size=8))
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.sampled_from([10**30, 10**400, 1 << 63, -(1 << 63), 1e308, 1e-320, float("nan"), float("inf"), True, False]),
)
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXTS, st.integers()), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def damaged(draw, content: bytes, at_least: int = 0) -> bytes:
    """The bytes with some flipped, overwritten, cut off, put in or appended; never the same. at_least: changed from there on."""
    place = draw(st.integers(at_least, len(content) - 1))
    how = draw(st.sampled_from(["flip", "flip", "flip", "overwrite", "zeros", "cut", "insert", "append", "drop"]))
    some = draw(st.binary(min_size=1, max_size=16))
    if how == "flip":
        changed = bytes([content[place] ^ 1 << draw(st.integers(0, 7))])
        return content[:place] + changed + content[place + 1 :]
    found = {
        "overwrite": content[:place] + some + content[place + len(some) :],
        "zeros": content[:place] + bytes(min(64, len(content) - place)) + content[place + 64 :],
        "cut": content[:place],
        "insert": content[:place] + some + content[place:],
        "append": content + some,
        "drop": content[:place] + content[place + len(some) :],
    }[how]
    return found if found != content else content[:place]


def changed_at(draw, tree, values=VALUES):
    """A copy of nested mappings and lists in which one place holds another value, is gone, or has a new neighbour."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(tree, key=str)))
        copy = dict(tree)
        what = draw(st.sampled_from(["in", "in", "in", "in", "gone", "new"]))
        if what == "in":
            copy[key] = changed_at(draw, tree[key], values)
        elif what == "gone":
            del copy[key]
        else:
            copy[draw(TEXTS)] = draw(values)
        return copy
    if isinstance(tree, list) and tree and draw(st.booleans()):
        place = draw(st.integers(0, len(tree) - 1))
        return [*tree[:place], changed_at(draw, tree[place], values), *tree[place + 1 :]]
    return draw(values)


def read_in_a_fork(path, names) -> None:
    """`foreign_hdf5.check` with a fork for a child, which starts in milliseconds, and ten seconds in place of a minute."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        try:
            foreign_hdf5.read_all(path, names)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        raise UserError(f"{path}: not a readable HDF5 file")


def one_line(error: UserError) -> None:
    assert "\n" not in str(error).strip() and str(error).strip()
