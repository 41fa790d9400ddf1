"""A pickle reader that imports nothing and calls nothing.

The opcodes run in a bounded loop over :func:`pickletools.genops`. Globals become inert :class:`Global` objects,
and what a pickle wants to construct becomes an inert :class:`Call`, unless the caller names a constructor of its
own for it. The standard unpickler isn't used even with ``find_class`` overridden: nine bytes (a memo index) make
it allocate gigabytes.
"""

from __future__ import annotations

import functools
import io
import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from ..errors import HostileError

MAX_OPCODES = 2_000_000
"""A tensor takes about thirty opcodes; nothing honest comes near this."""

# Limits on what one opcode may cost, however little of the file it takes: values are shared by memo, so anything that
# is copied, hashed or looked through at every use would add up to hours.
_LONGEST_NAME = 512
MOST_ARGUMENTS = 16
_WIDEST_INTEGER = 8 * 255  # bits; what LONG1 can hold
_LARGEST_INDEX = 1 << 32


class PickleError(Exception):
    """The opcodes can't be run; the message says why."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle wants to import; it never is."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Call:
    """An object that the pickle wants to construct; it never is."""

    function: Any
    arguments: Any
    items: list[Any] | None = None
    state: Any = None

    def extend(self, items: Iterable[Any]) -> None:
        """What the pickle appends to it, or sets in it."""
        if self.items is None:
            self.items = []
        self.items.extend(items)

    def __str__(self) -> str:
        return str(self.function) if isinstance(self.function, Global | str) else type(self.function).__name__


# Modules and functions that a checkpoint has no honest use for and an attack does: to run commands or code, to
# reach attributes by name, to load further pickles. Naming one is enough to be refused; all others are inert.
_HOSTILE_MODULES: Final = frozenset(
    "os posix nt subprocess _posixsubprocess sys shutil socket _socket runpy pty commands popen2 "
    "importlib imp pkgutil ctypes _ctypes webbrowser code codeop pdb bdb timeit cProfile profile trace "
    "multiprocessing asyncio pickle _pickle cPickle dill cloudpickle marshal shelve joblib requests "
    "urllib urllib2 http httplib ftplib smtplib telnetlib aiohttp ssl pip ensurepip venv distutils "
    "setuptools pydoc doctest idlelib lib2to3 winreg _winreg _winapi msvcrt zipimport _frozen_importlib "
    "_frozen_importlib_external _osx_support".split()
)
_HOSTILE_BUILTINS: Final = frozenset(
    "eval exec execfile compile open file input getattr setattr delattr __import__ globals locals vars "
    "breakpoint apply reload".split()
)
_HOSTILE_NAMES: Final = frozenset(
    "operator.attrgetter operator.methodcaller _operator.attrgetter _operator.methodcaller torch.hub.load "
    "torch.load torch.jit.load torch.serialization.load torch.utils.cpp_extension.load numpy.load "
    "numpy.fromfile numpy.testing._private.utils.runstring torch.jit.unsupported_tensor_ops.execWrapper "
    "torch.utils.collect_env.run io.open io.open_code io.FileIO _io.open _io.open_code _io.FileIO codecs.open "
    "types.CodeType types.FunctionType site.main numpy.f2py.crackfortran.myeval uuid._get_command_stdout "
    "numpy.distutils.exec_command.exec_command concurrent.futures.ProcessPoolExecutor".split()
)


@functools.lru_cache(maxsize=4096)
def is_hostile(reference: Global) -> bool:
    """Whether only an attack needs this name.

    A protocol 4 name may be dotted and then walks attributes, so ``torch`` with ``serialization.os.system`` is
    looked at part by part.
    """
    module, parts = reference.module, [*reference.module.split("."), *reference.name.split(".")]
    if module in {"builtins", "__builtin__", "__builtins__"}:
        return parts[1] in _HOSTILE_BUILTINS or len(parts) > 2
    if parts[0] in _HOSTILE_MODULES or str(reference) in _HOSTILE_NAMES:
        return True
    walked = reference.name.split(".")
    # No honest class is reached by way of a module that only attacks need, or of a name such as __globals__.
    return len(walked) > 1 and any(
        part in _HOSTILE_MODULES or part == "builtins" or part.startswith("__") for part in walked
    )


class _Mark:
    """The stack's marker."""


_MARK: Final = _Mark()
_SET: Final = Global("builtins", "set")
_FROZEN_SET: Final = Global("builtins", "frozenset")
# What genops and the steps below raise on opcodes that make no sense; a warning is raised where warnings are errors.
_FAILURES = (
    PickleError, ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, Warning
)  # fmt: skip
Constructor = Callable[..., Any]


class Machine:
    """Runs one pickle.

    Args:
        constructors: What to call instead of the global of that dotted name, with the pickle's own arguments.
        persistent: What to make of a persistent id.
    """

    def __init__(self, constructors: Mapping[str, Constructor], persistent: Callable[[Any], Any] | None = None) -> None:
        self._constructors = constructors
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._hostile: Global | None = None

    def run(self, stream: io.BytesIO) -> Any:
        """The value of the pickle that begins at the stream's position, which ends up behind it.

        Raises:
            PickleError: If it can't be run.
            HostileError: If it names what only an attack needs.
        """
        count = 0
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                count += 1
                if count > MAX_OPCODES:
                    raise PickleError(f"more than {MAX_OPCODES} opcodes")
                self._step(opcode.name, argument)
            if len(self._stack) != 1:
                raise PickleError("the stack doesn't end with one value")
        except _FAILURES as error:
            if self._hostile is None:
                raise PickleError(f"opcode {count}: {error}") from error
        if self._hostile is not None:
            self._refuse(self._hostile)
        return self._pop()

    def _refuse(self, reference: Global, arguments: Any = None) -> NoReturn:
        call = "" if arguments is None else f" with {_shortened(arguments)}"
        raise HostileError(
            f"its pickle wants to run {reference}{call}",
            remedy="don't open it with anything else, and get the model from a source you trust",
        )

    def _step(self, name: str, argument: Any) -> None:
        if name in _IGNORED:
            return
        if name in _PUSHES_ARGUMENT:
            if isinstance(argument, int) and argument.bit_length() > _WIDEST_INTEGER:
                raise PickleError(f"an integer of {argument.bit_length()} bits")
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        else:
            action = _ACTIONS.get(name)
            if action is None:
                raise PickleError(f"opcode {name} has no place in a checkpoint")
            action(self, argument)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise PickleError("a value was expected, and a mark found")
        return value

    def _top(self) -> Any:
        value = self._stack[-1]
        if value is _MARK:
            raise PickleError("a value was expected, and a mark found")
        return value

    def _pop_to_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                values = self._stack[index + 1 :]
                del self._stack[index:]
                return values
        raise PickleError("a mark was expected")

    # What the opcodes do, in the order of the table below.

    def _mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def _drop(self, _: Any) -> None:
        self._stack.pop()

    def _drop_to_mark(self, _: Any) -> None:
        self._pop_to_mark()

    def _duplicate(self, _: Any) -> None:
        self._stack.append(self._top())

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _tuple_of(self, size: int) -> None:
        values = [self._pop() for _ in range(size)]
        self._stack.append(tuple(reversed(values)))

    def _list(self, _: Any) -> None:
        self._stack.append(self._pop_to_mark())

    def _frozen_set(self, _: Any) -> None:
        self._stack.append(Call(_FROZEN_SET, (), self._pop_to_mark()))

    def _dict(self, _: Any) -> None:
        pairs = self._pop_to_mark()
        self._stack.append({})
        self._set_all(pairs)

    def _append(self, _: Any) -> None:
        value = self._pop()
        self._extend([value])

    def _appends(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list | Call):
            target.extend(values)
        else:
            raise PickleError("it appends to something that is no list")

    def _set_item(self, _: Any) -> None:
        value = self._pop()
        key = self._pop()
        self._set_all([key, value])

    def _set_items(self, _: Any) -> None:
        self._set_all(self._pop_to_mark())

    def _set_all(self, pairs: list[Any]) -> None:
        target = self._top()
        if len(pairs) % 2:
            raise PickleError("a key has no value")
        if isinstance(target, dict):
            for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                target[_as_key(key)] = value
        elif isinstance(target, Call):
            target.extend(pairs)
        else:
            raise PickleError("it sets items of something that is no dict")

    def _remember(self, index: Any) -> None:
        place = len(self._memo) if index is None else index
        if not 0 <= place < _LARGEST_INDEX:
            raise PickleError("a value is remembered under a number that no pickle uses")
        self._memo[place] = self._top()

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            raise PickleError("it recalls a value that it never remembered")
        self._stack.append(self._memo[index])

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_global(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise PickleError("a global's name is no text")
        self._push_global(module, name)

    def _push_global(self, module: str, name: str) -> None:
        if len(module) + len(name) > _LONGEST_NAME:
            raise PickleError(f"a global's name is {len(module) + len(name)} letters long")
        reference = Global(module, name)
        if is_hostile(reference):
            # Go on for a little: the call that follows tells what it wanted.
            self._hostile = self._hostile or reference
        self._stack.append(reference)

    def _reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        self._stack.append(self._construct(function, arguments))

    def _new_object_with_keywords(self, _: Any) -> None:
        keywords, arguments, function = self._pop(), self._pop(), self._pop()
        self._stack.append(Call(function, (arguments, keywords)))

    def _instance(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        arguments = tuple(self._pop_to_mark())
        self._push_global(module, name)
        self._stack.append(self._construct(self._pop(), arguments))

    def _object(self, _: Any) -> None:
        function, *arguments = self._pop_to_mark()
        self._stack.append(self._construct(function, tuple(arguments)))

    def _construct(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Global):
            if is_hostile(function):
                self._refuse(function, arguments)
            constructor = self._constructors.get(str(function))
            if constructor is not None:
                if not isinstance(arguments, tuple) or len(arguments) > MOST_ARGUMENTS:
                    raise PickleError(f"{function} is called in a way that torch never does")
                return constructor(*arguments)
        return Call(function, arguments)

    def _build(self, _: Any) -> None:
        # The state of an object stays inert with it; a dict's is what torch hangs on a state dict (its _metadata).
        state, target = self._pop(), self._top()
        if isinstance(target, Call):
            target.state = state
        elif not isinstance(target, dict):
            raise PickleError("it sets the state of something that has none")

    def _persistent_id(self, argument: Any) -> None:
        self._persist(argument)

    def _persistent_id_from_stack(self, _: Any) -> None:
        self._persist(self._pop())

    def _persist(self, identity: Any) -> None:
        if self._persistent is None:
            raise PickleError("it refers to storages that it has no place for")
        self._stack.append(self._persistent(identity))


_IGNORED: Final = frozenset({"PROTO", "FRAME", "STOP"})
_PUSHES_ARGUMENT: Final = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_CONSTANTS: Final[dict[str, Callable[[], Any]]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Call(_SET, ()),
}
_ACTIONS: Final[dict[str, Callable[[Machine, Any], None]]] = {
    "MARK": Machine._mark,
    "POP": Machine._drop,
    "POP_MARK": Machine._drop_to_mark,
    "DUP": Machine._duplicate,
    "TUPLE": Machine._tuple,
    "TUPLE1": lambda machine, _: machine._tuple_of(1),
    "TUPLE2": lambda machine, _: machine._tuple_of(2),
    "TUPLE3": lambda machine, _: machine._tuple_of(3),
    "LIST": Machine._list,
    "FROZENSET": Machine._frozen_set,
    "DICT": Machine._dict,
    "APPEND": Machine._append,
    "APPENDS": Machine._appends,
    "ADDITEMS": Machine._appends,
    "SETITEM": Machine._set_item,
    "SETITEMS": Machine._set_items,
    "PUT": Machine._remember,
    "BINPUT": Machine._remember,
    "LONG_BINPUT": Machine._remember,
    "MEMOIZE": Machine._remember,
    "GET": Machine._recall,
    "BINGET": Machine._recall,
    "LONG_BINGET": Machine._recall,
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._reduce,
    "NEWOBJ_EX": Machine._new_object_with_keywords,
    "INST": Machine._instance,
    "OBJ": Machine._object,
    "BUILD": Machine._build,
    "PERSID": Machine._persistent_id,
    "BINPERSID": Machine._persistent_id_from_stack,
}


def _as_key(key: Any) -> Any:
    """Keys that hash in constant time, and to values that nobody chose.

    The hash of a nested tuple can be made to take forever or overflow, and wide integers can be chosen to collide.
    """
    if key is None or isinstance(key, str | bytes) or (isinstance(key, int) and key.bit_length() < 64):
        return key
    return Call(repr(key) if isinstance(key, int | float) else type(key).__name__, ())


def _shortened(arguments: Any) -> str:
    values = arguments if isinstance(arguments, tuple) else (arguments,)
    shown = [
        repr(value[:60]) if isinstance(value, str | bytes) else f"<{type(value).__name__}>" for value in values[:4]
    ]
    return ", ".join(shown) or "no arguments"
