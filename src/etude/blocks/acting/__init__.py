"""Acting: which environment is meant, copies of it stepped together, episodes, tables, replay and returns."""
