//! .dockerignore patterns.
