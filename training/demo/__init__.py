"""The demo: data made of real photographs, small models, three ways of training, one report."""
