# Read by CMake right after the project() line of llama-cpp-python, which
# forces LLAMA_BUILD_COMMON on in the cache. The Python bindings load libllama
# and libggml only; the normal variable wins over the cache entry and leaves out
# llama.cpp's command-line library, a third of the compile time.
set(LLAMA_BUILD_COMMON OFF)
