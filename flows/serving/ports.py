"""Ports that a command binds: looked at before anything starts, and what is said where one cannot be had."""

from __future__ import annotations

import errno
import socket

from flows.config import ConfigError
from flows.launcher import free_port


def chosen_port(field: str, port: int, host: str) -> int:
    """The port itself, or a free one for 0.

    Raises:
        ConfigError: It cannot be bound.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            raise port_error(field, port, host, error) from error
        return port or free_port(host)


def port_error(field: str, port: int, host: str, error: OSError) -> ConfigError:
    """What is wrong with a port, or with the address that it was to be bound on.

    Args:
        field: Name of the setting below `serve`.
        port: Its value.
        host: Value of `serve.host`, or loopback.
        error: What binding raised.
    """
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(
            f"serve.host={host} cannot be used for serve.{field}: {error.strerror}. Set serve.host=127.0.0.1 (this "
            "machine alone), 0.0.0.0 (all its addresses), or one of its IPv4 addresses."
        )
    remedy = "Ports below 1024 are for root: set" if error.errno == errno.EACCES else "Stop what uses it, or set"
    return ConfigError(
        f"serve.{field}={port} cannot be bound on {host}: {error.strerror}. {remedy} serve.{field}=0 for any free port."
    )
