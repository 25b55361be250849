"""BitMar: quantised layers, text and vision encoders, fusion, episodic memory, decoder."""
