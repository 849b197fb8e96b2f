"""Run `python -m ddim_plugin.cli`."""

from . import main

raise SystemExit(main())
