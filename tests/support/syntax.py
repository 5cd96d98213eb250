"""Syntax trees of the project's code."""

from __future__ import annotations

import ast
import gc


def parse(source: str) -> ast.Module:
    """A syntax tree, made without collections of garbage: they take twice as long as the parser."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if collects:
            gc.enable()
