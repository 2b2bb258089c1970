"""The client: one asynchronous core, its transports and a synchronous facade."""
