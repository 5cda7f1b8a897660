"""``modes-fx demo``: calibrate, search, evaluate and time the embedded model, and write the page of it."""
