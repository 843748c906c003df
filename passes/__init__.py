"""Graph rewrites, one a file; installed as `micromix_compile.passes`."""
