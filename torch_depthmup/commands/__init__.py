"""The commands of ``depthmup``, one a module, each with its ``add_arguments(parser)`` and ``run(options)``."""
