"""One file per source format. Each has ``NAME``, ``sections(path) -> list of ids`` and ``read(path, id, mpp)``."""
