"""sparsetune: search the hyperparameters of sparse training methods, and compare them fairly."""
