"""Functions of one's own, named package.module:name in a configuration."""

import importlib
from typing import Any


def foreign(name: str, field: str, kind: type, **arguments: Any) -> Any:
    """What the callable package.module:name returns for the arguments, a `kind`.

    Raises:
      ValueError: naming `field`, if there is no such callable, or it does not take the arguments or return a `kind`.
    """
    module, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)(**arguments)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field}: {name!r} cannot be imported ({error})") from None
    except TypeError as error:
        raise ValueError(f"{field}: {name!r} must be a function that takes {', '.join(arguments)} by keyword ({error})") from None
    if not isinstance(made, kind):
        raise ValueError(f"{field}: {name!r} must return a {kind.__name__}, not {type(made).__name__}")
    return made
