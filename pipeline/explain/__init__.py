"""Where an engine departs from its model: the operator, its module, its line."""
