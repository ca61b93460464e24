"""One function per verb, each its own description: what is checked first, the steps, what comes back."""

from __future__ import annotations
