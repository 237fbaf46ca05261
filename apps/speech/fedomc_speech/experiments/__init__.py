"""The paper's experiments: read from TOML files, run, and made into tables and figures."""
