//! Variables in the order in which they were first set. A look-up takes as long with many of them as with few.

use crate::word::Variables;
use std::collections::HashMap;

/// Names and values.
#[derive(Debug, Clone, Default)]
pub(crate) struct Environment {
    list: Vec<(String, String)>,
    places: HashMap<String, usize>,
}

impl Environment {
    /// Sets a variable: in place where it exists, else at the end.
    pub(crate) fn set(&mut self, name: &str, value: String) {
        match self.places.get(name) {
            Some(&place) => self.list[place].1 = value,
            None => {
                self.places.insert(name.to_owned(), self.list.len());
                self.list.push((name.to_owned(), value));
            }
        }
    }

    /// All of them in order.
    pub(crate) fn list(&self) -> &[(String, String)] {
        &self.list
    }
}

impl Variables for Environment {
    fn get(&self, name: &str) -> Option<&str> {
        self.places.get(name).map(|&place| self.list[place].1.as_str())
    }

    fn names(&self) -> Vec<&str> {
        self.list.names()
    }
}
