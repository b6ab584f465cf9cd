"""An OpenAI-compatible server: `llava-lite serve`. Needs the extra `serve`.

    settings    the limits and permissions of a server
    protocol    requests and responses in the format of OpenAI
    errors      errors as an HTTP status and OpenAI's error object
    messages    OpenAI messages become the turns of a prompt and its images
    images      image sources become small pictures, safely
    prepare     all of this together: the bytes of a request become a job
    image_cache encoded images of the latest requests
    worker      the one thread that runs the model, with continuous batching
    limits      bodies of bounded size; handlers that stop when the client leaves
    middleware  access control, and one line of log per request
    chat        /v1/chat/completions, whole or streamed
    app         the routes
    run         the process: uvicorn, signals, a graceful shutdown

This file imports nothing: the package is optional.
"""
