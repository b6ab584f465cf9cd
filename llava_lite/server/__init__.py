"""An OpenAI-compatible server: `llava-lite serve`. Needs the extra `serve`.

    settings    what a server allows and how much of it
    protocol    requests and responses as OpenAI's clients write and read them
    errors      what goes wrong, as an HTTP status and OpenAI's error object
    messages    OpenAI messages become the turns of a prompt and its images
    images      image sources become small pictures, without being led astray
    prepare     all of that together: a request's bytes become a job
    image_cache what the model saw in the images that were sent last
    worker      the one thread that runs the model: a batch whose members come and go
    limits      bodies of bounded size; the handlers that stop when their client does
    middleware  who may ask at all, and one line of log per request
    chat        /v1/chat/completions, whole or streamed
    app         the routes
    run         the process: uvicorn, signals, a shutdown that finishes what runs

Nothing is imported here: the package is optional.
"""
