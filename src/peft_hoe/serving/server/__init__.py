"""A server of its own for routed models: OpenAI's completions and chat with a preference in every request.

`engine` runs texts of different preferences in one batch, `requests` reads what is asked, `app` speaks HTTP. The extra `serve`
brings FastAPI and uvicorn.
"""
