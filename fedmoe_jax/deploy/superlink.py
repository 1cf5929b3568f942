"""Flower's SuperLink, whose control is open to its own machine alone: python -m fedmoe_jax.deploy.superlink FLAGS.

SuperNodes reach the SuperLink by the port at which Flower 1.41 also takes orders: to start runs, which are code that SuperNodes execute,
and to register keys, both from anyone without an account. So here only /v1/fleet, where SuperNodes authenticate themselves, is open to all.
"""

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any

OPEN = "/v1/fleet/"
"""What other machines may reach."""


class Guard:
    """ASGI middleware that answers 403 to what comes from another machine and is not under `OPEN`."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or (scope["path"].startswith(OPEN) and "/.." not in scope["path"]) or _is_here(scope.get("client")):
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"only from this machine"})


def _is_here(client: Any) -> bool:
    try:
        return ipaddress.ip_address(client[0]).is_loopback
    except (TypeError, ValueError, IndexError):
        return False


def main() -> None:
    """Runs `flower-superlink` with the guard."""
    from flwr.superlink import main as superlink
    from flwr.superlink.cli.flower_superlink import flower_superlink

    create = superlink.create_app

    def guarded(*args: Any, **options: Any) -> Any:
        app = create(*args, **options)
        app.add_middleware(Guard)
        return app

    superlink.create_app = guarded
    flower_superlink()


if __name__ == "__main__":
    main()
