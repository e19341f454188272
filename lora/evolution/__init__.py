"""How an engine learns: data sets, training, and (in later versions) distillation and the factory that runs both."""
