"""What to do with the models of a search: export one, or go part of the way from its base."""
