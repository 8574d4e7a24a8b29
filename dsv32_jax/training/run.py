"""A stage under way: model, optimiser, data and folder of one config.

