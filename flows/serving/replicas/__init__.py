"""Several supervised inference servers behind one proxy."""
