"""Serving of a base and its adapters over HTTP, with the requests of OpenAI's API.

engine.py           requests into rows, rows into tokens: the thread that computes
limits.py           sizes of the engine
row_table.py        the rows in use and their blocks of the cache
adapter_slots.py    the adapters of a call, as windows of its rows
call_rows.py        rows as the arrays of a call, results as records of tokens
serving_model.py    base and adapters on the devices, with the cache: calls the compiled functions
model_calls.py      compiled functions: tokens into cache, routing and next tokens
row_sampling.py     compiled functions: logits into tokens, by settings of each row
answer.py           one answer: what is asked for, its tokens as text and events
fields.py           the fields of a body one by one, and errors in the form of OpenAI's API
protocol.py         bodies of requests into checked settings
responses.py        answers into OpenAI's objects
service.py          models by name, requests into answers
answer_stream.py    events of the engine's thread into server-sent events
app.py              routes
server.py           sockets, signals, time limits
load.py             base and adapters from their folders
metrics.py          numbers for Prometheus
"""
