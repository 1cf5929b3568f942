"""Client data: the device-resident population, splits over clients, and readers of real data sets."""
