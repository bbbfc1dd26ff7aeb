"""The parts of a report's page: what runs recorded, turned into tables, curves, bars and clips."""
