"""Speed of random-weight layers of well-known models: stock transformers, modes-fx and vLLM's CPU kernel, in turn.

No checkpoint is read: ``presets`` holds the shapes, ``models`` builds layers of them. ``machine`` measures what the processor
can do, which gives each time its distance to the limit; ``options`` says what is measured, ``parts`` puts all
together, ``output`` shows them.
"""
