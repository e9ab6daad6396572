# Read by CMake when it sets up llama.cpp (.cargo/config.toml says so): leaves out what no part of ecso calls.
if(PROJECT_NAME STREQUAL "llama.cpp")
    # What llama.cpp's own programs share: flags, chat parsers, downloads by HTTP. It takes minutes to compile.
    set(LLAMA_BUILD_COMMON OFF CACHE BOOL "" FORCE)
    # Frames of videos, which would be read with the program ffmpeg.
    set(MTMD_VIDEO OFF CACHE BOOL "" FORCE)
endif()
