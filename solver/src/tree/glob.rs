//! COPY globs (Go filepath.Match).
