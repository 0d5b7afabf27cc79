"""What instances tell each other through RabbitMQ. Rooms:

words     what is told, and how it is written
link      the thread and the connections that all stores of the process share
speaker   what an instance tells the others
listener  what it hears, and how far that is done
seat      both in the sessions of one store; the argument is there
bus       the same for callers: from any thread and any event loop
"""
